// Package twosites holds the test of a whole enrolment: from two empty
// machines to encrypted packets, with only the commands that the program
// prints. It has no code of its own.
package twosites
