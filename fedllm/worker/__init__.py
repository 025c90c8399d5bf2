"""What a worker does: it claims bundles, trains their clients and publishes their updates."""
