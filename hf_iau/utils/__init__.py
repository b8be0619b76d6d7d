"""Small helpers that know nothing of unlearning."""
