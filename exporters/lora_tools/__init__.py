"""Tools for adapter files: describe, extract, merge, convert. numpy only, one tensor at a time."""
