"""Pages for a browser: one file each, without a request to anywhere."""
