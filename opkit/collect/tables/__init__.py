"""What is written: the field's tables, validated, each with its provenance. Measures nothing."""
