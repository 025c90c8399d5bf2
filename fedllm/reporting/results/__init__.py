"""What came out of a run: metrics, spectra, comparisons."""
