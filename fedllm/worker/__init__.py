"""The worker: it claims bundles, trains their clients and publishes their updates."""
