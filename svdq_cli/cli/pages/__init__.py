"""What each report looks like on a terminal; `render` chooses the page."""
