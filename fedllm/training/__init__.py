"""The trainers of clients, by one protocol."""
