"""Pictures and pages for people: overlays, numbered marks, the HTML page of a trace."""
