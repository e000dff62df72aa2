package main

import "slices"

// Row is a record with 8 to 12 members. The last four are left out of some rows.
type Row struct {
	ID     int64    `json:"id"`
	Name   string   `json:"name"`
	Price  float64  `json:"price"`
	Stock  int64    `json:"stock"`
	Active bool     `json:"active"`
	Parent *int64   `json:"parent"` // null in half of the rows
	Place  Place    `json:"place"`
	Tags   []string `json:"tags"`

	Weight float64 `json:"weight,omitempty"`
	Locked bool    `json:"locked,omitempty"`
	Maker  string  `json:"maker,omitempty"`
	Note   string  `json:"note,omitempty"`
}

// Place is the nested object of a row.
type Place struct {
	Lat   float64 `json:"lat"`
	Lon   float64 `json:"lon"`
	Floor int64   `json:"floor"`
}

const rowSize = 200 // bytes of JSON, on average

// newRows returns rows that take about size bytes of JSON: one shorter row if a
// usual one is too large.
func newRows(size int) []Row {
	if size < rowSize {
		return []Row{{ID: 7, Name: `6" pipe`, Price: 9.5, Stock: 42, Active: true, Place: Place{1.5, 2.5, 3}, Tags: []string{"new"}}}
	}
	var made []Row
	d := newDataMaker()
	for rest := size; rest > rowSize/2; {
		row := d.row()
		made = append(made, row)
		rest -= jsonSize(row) + len(",")
	}
	return made
}

func (d dataMaker) row() Row {
	row := Row{
		ID:     1_000_000 + d.Int64N(9_000_000),
		Name:   d.text(),
		Price:  d.fraction(1000, 2),
		Stock:  d.Int64N(5000),
		Active: d.IntN(2) == 0,
		Place:  Place{d.fraction(90, 5), -d.fraction(180, 5), d.Int64N(40)},
	}
	if d.IntN(2) == 0 {
		parent := 1_000_000 + d.Int64N(9_000_000)
		row.Parent = &parent
	}
	for range 1 + d.IntN(2) {
		row.Tags = append(row.Tags, d.text())
	}
	if d.IntN(2) == 0 {
		row.Weight = d.fraction(50, 3)
	}
	row.Locked = d.IntN(2) == 0
	if d.IntN(3) == 0 {
		row.Maker = d.text()
	}
	if d.IntN(4) == 0 {
		row.Note = d.text()
	}
	return row
}

// equalRows compares member by member, which takes a hundredth of what decoding
// takes. reflect.DeepEqual takes a good part of it.
func equalRows(a, b []Row) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !equalRow(&a[i], &b[i]) {
			return false
		}
	}
	return true
}

func equalRow(a, b *Row) bool {
	return a.ID == b.ID && a.Name == b.Name && a.Price == b.Price && a.Stock == b.Stock && a.Active == b.Active &&
		(a.Parent == nil) == (b.Parent == nil) && (a.Parent == nil || *a.Parent == *b.Parent) &&
		a.Place == b.Place && slices.Equal(a.Tags, b.Tags) &&
		a.Weight == b.Weight && a.Locked == b.Locked && a.Maker == b.Maker && a.Note == b.Note
}
