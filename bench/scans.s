// This file is empty: see scans.go.
