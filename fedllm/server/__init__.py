"""The server: it makes a server state from updates or adapters, and adapters from a state."""
