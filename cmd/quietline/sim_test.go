package main

import "testing"

func TestSim(t *testing.T) { script(t, "sim") }
