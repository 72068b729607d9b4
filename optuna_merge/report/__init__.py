"""What a study shows: tables, pictures, pages, the dashboard and trackers."""
