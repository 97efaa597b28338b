"""The judge of last resort: networks trained anew on fresh data, and what the posteriors of one of them say of their spread."""
