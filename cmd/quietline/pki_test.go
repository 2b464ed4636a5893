package main

import "testing"

func TestPKI(t *testing.T) { script(t, "pki") }
