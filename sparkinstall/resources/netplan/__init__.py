"""netplan for the QSFP ports: its files, and the live interfaces."""
