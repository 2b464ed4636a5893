package simulator

import (
	"errors"
	"math"
	"testing"
)

func TestPresets(t *testing.T) {
	names := map[string]bool{}
	for _, p := range Presets() {
		t.Run(p.Name, func(t *testing.T) {
			if err := p.Link.Validate(); err != nil {
				t.Fatal(err)
			}
			if names[p.Name] || p.Name == "" || p.Sources == "" || p.Description == "" {
				t.Error("name, description or sources are missing or used twice")
			}
			names[p.Name] = true
			if got, err := PresetByName(p.Name); err != nil || got.BlockBits != p.BlockBits {
				t.Errorf("PresetByName = %v, %v", got.Name, err)
			}
			f := p.Forecast()
			if f.SecretBits <= 0 || f.SecretBits >= p.BlockBits/2 || f.SecretBPS <= 0 {
				t.Errorf("forecast gives no likely key: %+v", f)
			}
		})
	}
	if _, err := PresetByName("no such"); !errors.Is(err, ErrPreset) {
		t.Errorf("PresetByName of an unknown name = %v", err)
	}
}

// What the demo promises rests on these figures.
func TestMetroForecast(t *testing.T) {
	p, err := PresetByName("metro")
	if err != nil {
		t.Fatal(err)
	}
	f := p.Forecast()
	if math.Abs(f.QBER-0.0151) > 2e-4 {
		t.Errorf("set error is %.4f, want 0.0151", f.QBER)
	}
	if f.BlockSeconds > 2 {
		t.Errorf("a block takes %.1f s, want 2 s at most", f.BlockSeconds)
	}
	if f.SecretBPS < 50e3 {
		t.Errorf("%.0f secret bits a second, want 50,000 at least", f.SecretBPS)
	}
}

// The 26 dB point of Rusca et al. 2018, table I, is 243 kbit/s at 1e7 bits a
// block; a block of 1e6 and Wiesemann's terms must give less, not less than half.
func TestGenevaForecastNearItsPaper(t *testing.T) {
	p, err := PresetByName("rusca-100km")
	if err != nil {
		t.Fatal(err)
	}
	if f := p.Forecast(); f.SecretBPS > 243e3 || f.SecretBPS < 243e3/2 {
		t.Errorf("%.0f secret bits a second, want 122,000 to 243,000", f.SecretBPS)
	}
}

func TestForecastWithoutDecoy(t *testing.T) {
	p := bench()
	p.Link.Intensities = p.Link.Intensities[:1]
	p.Link.Intensities[0].Prob = 1
	if f := p.Forecast(); f.SecretBits != 0 || f.QBER <= 0 || math.IsNaN(f.QBER) {
		t.Errorf("forecast = %+v", f)
	}
}
