"""Planning: tiers, cohorts, bundles, costs and seeds, all pure."""
