package main

import "testing"

func TestLine(t *testing.T) { script(t, "line") }
