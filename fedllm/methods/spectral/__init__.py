"""Methods whose state is spectral, U S V^T: means of products."""
