"""Speed against peers, side by side on one machine. Imports engram and experiments; nothing imports it."""
