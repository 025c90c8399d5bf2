"""Tiers, cohorts, bundles, cost model, seeds: pure."""
