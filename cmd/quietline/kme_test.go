package main

import "testing"

func TestKME(t *testing.T) { script(t, "kme") }
