"""Real parts that stand in for a DGX Spark: fresh Debian nodes with systemd, and an arm64 chroot.

`node.FreshNode` boots a node, `arm64.chroot` creates an arm64 tree, `layers` names what this machine cannot run.
"""
