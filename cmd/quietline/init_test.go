package main

import "testing"

func TestInit(t *testing.T) { script(t, "init") }
