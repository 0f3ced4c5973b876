"""Test vectors of the specification."""
