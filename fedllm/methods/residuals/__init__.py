"""Methods that change the base: what an adapter cannot hold goes into its weights."""
