-- Make what was read from the cold tier hot, if the lease still stands.
-- KEYS: hot hash, namespaces
-- ARGV: token, checkpoint record, number of blobs, ttl in ms ('0' = none), one record of writes per task...
-- Returns 1 if it became hot, else 0.
local hot = KEYS[1]
if redis.call('HGET', hot, 'l') ~= ARGV[1] then return 0 end
redis.call('DEL', hot)
local record = unframe(ARGV[2])
local id = record[3]
redis.call('HSET', hot, 'id', id, 'p', record[4], 'c', record[5], 'm', record[6], 'k', ARGV[3])
for i = 7, #record, 3 do
  redis.call('HSET', hot, 'v:' .. record[i], record[i + 1], 'b:' .. record[i], record[i + 2])
end
local count = 0
for i = 5, #ARGV do
  local writes = unframe(ARGV[i])
  local stem = 'w:' .. id .. '\0' .. writes[4] .. '\0'
  for j = 7, #writes, 3 do
    redis.call('HSET', hot, stem .. writes[j], writes[5] .. '\0' .. writes[j + 1] .. '\0' .. writes[j + 2])
    count = count + 1
  end
end
redis.call('HSET', hot, 'wn', count)
redis.call('SADD', KEYS[2], record[2])
if ARGV[4] ~= '0' then redis.call('PEXPIRE', hot, ARGV[4]) end
return 1
