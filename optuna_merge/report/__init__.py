"""Shows a study: figures, tables, pictures, the HTML page, the dashboard and trackers."""
