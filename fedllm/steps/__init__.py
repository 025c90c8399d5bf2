"""What a job does, from paths to published records: prepare, train, aggregate, evaluate."""
