// Quietline keeps the lines between sites secret with keys from quantum key
// distribution. This one binary is every daemon of a site and every command
// for the people who run it; `quietline help` lists them.
package main

import "os"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }
