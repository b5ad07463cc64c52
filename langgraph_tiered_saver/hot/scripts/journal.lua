-- Read a thread's journal from the start.
-- KEYS: journal, shard
-- ARGV: most records, most bytes (at least one record is given), generation ('' = any)
-- Returns {journal length, sequence number, record, sequence number, record, ...}.

-- Whoever trusts a generation takes what is not here for flushed. A server that was emptied keeps its run id and its
-- connections, so it must be asked in the same breath whether it is what it was.
if ARGV[3] ~= '' then
  local generation = redis.call('HGET', KEYS[2], 'g')
  if generation ~= ARGV[3] then
    return redis.error_reply('TIEREDGENERATION the generation here is ' .. (generation or 'unknown'))
  end
end
local out = {redis.call('XLEN', KEYS[1])}
local left, bytes, from = tonumber(ARGV[1]), tonumber(ARGV[2]), '-'
while left > 0 and bytes > 0 do
  local entries = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', math.min(left, 16))
  if #entries == 0 then break end
  for i = 1, #entries do
    if bytes <= 0 then break end
    out[#out + 1] = string.match(entries[i][1], '%d+')
    out[#out + 1] = entries[i][2][2]
    bytes = bytes - #entries[i][2][2]
    left = left - 1
    from = '(' .. entries[i][1]
  end
end
return out
