"""Failures seen in other libraries, each kept as a test that would notice it here."""
