"""Doctor, support bundle, and the masking of personal data."""
