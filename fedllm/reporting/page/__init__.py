"""The report of a run: one page with charts and tables, and the charts as figures."""
