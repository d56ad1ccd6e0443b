"""Engines behind one small protocol; an engine is imported when it is used, never here."""
