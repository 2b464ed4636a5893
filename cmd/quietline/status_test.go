package main

import "testing"

func TestStatus(t *testing.T) { script(t, "status") }
