"""From facts to findings: pure functions, one a finding."""
