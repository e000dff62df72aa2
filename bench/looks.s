// This file is empty: see looks.go.
