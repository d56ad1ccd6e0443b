"""What people read of records: one self-contained HTML page, and the same tables in the terminal."""
