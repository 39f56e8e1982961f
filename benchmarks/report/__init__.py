"""From the stored figures to a page and a picture. Nothing here measures."""
