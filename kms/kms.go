// Package kms is one key manager (KME): blocks of secret bits in, keys out,
// each key delivered once.
package kms
