"""Tables and pages for people, made from records."""
