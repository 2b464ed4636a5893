package gf2

// Toeplitz hashes the n bits of x to m bits with the modified Toeplitz matrix
// [I_m | T]: y_i = x_i + Σ_j T_ij x_{m+j} with T_ij = s_{n-m-1+i-j}, i < m,
// j < n-m (Hayashi, Tsurumaru, IEEE Trans. Inf. Theory 62, 2213 (2016): dual
// universal, seed of n-1 bits). x and seed hold at least n and n-1 bits; bits
// above are ignored. The result has (m+63)/64 words, bits above m zero.
// It panics unless 0 <= m <= n.
func Toeplitz(x []uint64, n int, seed []uint64, m int) []uint64 {
	if m < 0 || m > n {
		panic("gf2: hash longer than its input")
	}
	y := extract(x, 0, m)
	if m == n || m == 0 {
		return y
	}
	tail := extract(x, m, n-m)
	// Coefficient n-m-1+i of seed·tail is Σ_j s_{n-m-1+i-j} tail_j.
	prod := Mul(extract(seed, 0, n-1), tail)
	part := extract(prod, n-m-1, m)
	for i := range y {
		y[i] ^= part[i]
	}
	clear(tail)
	clear(prod)
	clear(part)
	return y
}

// extract copies n bits of p from bit at on; bits beyond p's end are zero.
func extract(p []uint64, at, n int) []uint64 {
	out := make([]uint64, (n+63)/64)
	word, shift := at/64, uint(at%64)
	for i := range out {
		if word+i < len(p) {
			out[i] = p[word+i] >> shift
		}
		if shift > 0 && word+i+1 < len(p) {
			out[i] |= p[word+i+1] << (64 - shift)
		}
	}
	if r := uint(n % 64); r > 0 {
		out[len(out)-1] &= 1<<r - 1
	}
	return out
}
