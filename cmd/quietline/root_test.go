package main

import "testing"

func TestRoot(t *testing.T) { script(t, "root") }
