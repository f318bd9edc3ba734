"""Pages for a person: self-contained HTML files without scripts, for phones and for print."""
