"""The HTML report, its plots and the same summaries as rows for the terminal; everything is drawn from plain data."""
