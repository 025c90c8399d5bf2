"""Trackers: the metrics of every round, handed to experiment trackers by the coordinator."""
