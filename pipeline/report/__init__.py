"""The report of a run: its document, changes, charts and page."""
