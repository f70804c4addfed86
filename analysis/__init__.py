"""Reads run directories and tables, fits, draws. Imports neither torch nor the packages that train."""
