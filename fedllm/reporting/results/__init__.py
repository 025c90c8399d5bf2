"""Results of a run: metrics, spectra, comparisons."""
