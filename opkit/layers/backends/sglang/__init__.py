"""SGLang 0.5.14: its server's arguments cut down to one layer, and its model runner driven by hand."""
