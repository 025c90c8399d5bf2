"""The server's side: adapters and updates to a server state, and a state to adapters."""
